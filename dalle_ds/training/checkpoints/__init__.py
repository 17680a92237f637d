"""Checkpoints: what is in one, how it lies on the disk, which there are and which is resumed, and how they are written.

content     weights, moments, averages, error-feedback buffers and state of an engine; going on from them
storage     which slices of which parameter a process has; tensors on the disk, and reading any part of them
writing     who writes which slice, and writing it
manifest    every file with length and digest; the checkpoints of a run: complete or absent, damaged, kept
saver       when they are written, asynchronously
"""
