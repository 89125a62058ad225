"""Supervised fine-tuning: tasks on records, with answers to write or labels to score."""
