"""Proof: does the package compute what the model computes?"""
