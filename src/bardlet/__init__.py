"""bardlet: a text goes in, a GPT that you trained, understood and can run anywhere comes out."""

__version__ = "0.2.0"
