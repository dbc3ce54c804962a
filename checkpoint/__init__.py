"""Files on disk: configuration, weights, tokenizer, inflation. Nobody must open this folder to
understand SSD.
"""
