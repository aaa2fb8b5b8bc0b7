"""Scores descriptions: text measures against annotations, AUROC, bootstrap intervals."""
