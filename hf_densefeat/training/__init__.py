"""DenseTrainer: the transformers Trainer on adjacent notes."""
