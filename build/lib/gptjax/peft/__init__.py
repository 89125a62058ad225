"""Parameter-efficient fine-tuning: few parameters trained, the rest of the model frozen."""
