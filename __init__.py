"""dsd: a node daemon that serves DeepSeek-V3 and DeepSeek-R1."""

__version__ = "0.1.0"
