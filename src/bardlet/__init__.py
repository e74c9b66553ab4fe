"""bardlet: a text goes in, a GPT that you trained, understood and can run anywhere comes out."""

__version__ = "0.1.0"
