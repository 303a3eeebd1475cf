"""The small model that comes with dsd: its data, training, export and evaluation."""
