"""The page of `samoe app`: track, correct, look inside, and learn from what was corrected.

Files without `page` in their names know no Gradio: they are the app's core, and can be used and tested without a page.
"""
