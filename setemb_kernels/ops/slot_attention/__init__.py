"""One step of slot attention: a softmax over the slots of each token, then a weighted mean over the tokens."""
