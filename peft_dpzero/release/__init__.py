"""What works on released numbers only: the optimizer, the journal, the record and the model card."""
