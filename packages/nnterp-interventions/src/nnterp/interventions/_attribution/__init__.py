"""Attribution: what parts of a model give to a prediction, estimated from one run and its gradient."""
