"""The one door out of the private data: clipping, exact noise, and the accountant that pays for both."""
