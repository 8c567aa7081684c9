if __name__ != "dvi.problems":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.problems, not problems")
