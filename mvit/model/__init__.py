"""The model family; imports torch alone, so it can be lifted out whole."""
