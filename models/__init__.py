"""How the reference language model in `models/reference` was made and measured."""
