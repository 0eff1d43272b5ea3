"""edge_llm: quantized GGUF models on small CPU clusters, prefill and decode split across nodes."""

__version__ = "0.1.0"
