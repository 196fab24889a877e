# SPDX-License-Identifier: Apache-2.0
"""One decoder for all families, and where its arrays live. It neither samples nor computes losses.

In reading order: config.py (the numbers and switches of a family), decoder.py (embed, layers,
hidden states), attention.py, text_attention.py (of whole texts), rope.py (rotary positions),
projection.py (linear maps and LoRA adapters), head.py (hidden states to logits), sharding.py (mesh,
FSDP, tensor and sequence parallelism). For decoding: kv_cache.py, decode_attention.py and
token_attention.py (kernels for TPUs and for GPUs), quantized.py (8-bit weights), weights_first.py
(matrices laid out for a CPU), joined.py (for a GPU).
"""
