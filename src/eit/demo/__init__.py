"""The local page of `eit demo`: what a model predicts for a picture, and what its layers compute."""
