"""The field's files of dictionaries."""
