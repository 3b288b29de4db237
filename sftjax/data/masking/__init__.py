"""From a record to tokens, each with the weight at which it is trained."""
