"""Checkpoints for other programs: safetensors files, under megatron-core's names or Hugging Face's, and mean values."""
