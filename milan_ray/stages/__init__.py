"""What makes each table: a file per stage."""
