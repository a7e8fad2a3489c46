"""What is kept: the SQL store, factor files and the forms that other software loads."""
