"""Answers to labelled or test rows, their scores, and archives for the evaluation servers."""
