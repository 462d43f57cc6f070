"""What the example programs share. They are found beside it: `from support.methods import ...`."""
