"""The cluster tree of a corpus, and the encoder that it is made with."""
