"""What several models share: attention kinds, layers that a tensor group divides, losses over a vocabulary or over ranks."""
