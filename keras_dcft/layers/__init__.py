"""The layers: what they share, and one file for each kind of Keras layer that is adapted."""
