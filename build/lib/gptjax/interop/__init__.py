"""Models of other libraries' files, both ways."""
