"""Pruning of vision transformers as a library: data, model -> scores -> plan -> smaller model -> measurement.

Needs torch and timm, nothing of `search`.
"""
