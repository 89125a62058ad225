"""How good answers are: the metrics of the field by its libraries, with bootstrap intervals."""
