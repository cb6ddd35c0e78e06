"""factlens: where a language model stores a fact, and what happens when it is changed there."""
