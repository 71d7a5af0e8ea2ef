"""Fine-tuning from the command line: text, one training loop, held-out bits per byte, and the demo."""
