"""What a model is worth: losses and scores over sets, generated answers."""
