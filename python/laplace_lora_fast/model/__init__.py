"""All that knows nn.Module, PEFT and batches."""
