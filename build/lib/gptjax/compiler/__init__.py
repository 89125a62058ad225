"""What a training or decoding step costs on accelerators that are not here."""
