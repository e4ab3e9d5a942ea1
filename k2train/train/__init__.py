"""Training under DeepSpeed: engine, ZeRO adapters, loop and what the person sees."""
