"""What makes passes cheaper, one file each. Each can be left out alone."""
