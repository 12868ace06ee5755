"""Networks in torch, and their training and fine-tuning."""
