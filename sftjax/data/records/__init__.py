"""Records by index, of files of many kinds; rows that cannot be used."""
