"""The commands of `factlens`, by what they are about; `cli.py` puts them together."""
