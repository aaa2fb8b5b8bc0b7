"""How good are descriptions: text measures against annotations, AUROC, bootstrap intervals."""
