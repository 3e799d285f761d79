def print_table(t, rows): print(t, rows)
def write_json(p, rows): pass
