"""One step: what starts, a batch's gradient, the optimiser, what is trained."""
