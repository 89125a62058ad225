"""Metrics of answers, by the field's own libraries, with bootstrap intervals."""
