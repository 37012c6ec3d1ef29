"""The function and its gradients: one oracle, three backends, and the choice between them."""
