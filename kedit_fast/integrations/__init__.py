"""Drop-in functions with the signatures of EasyEdit, memit and AlphaEdit."""
