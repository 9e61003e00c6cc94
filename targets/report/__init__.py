"""A comparison for people: table cells, a picture, and one HTML page. Knows no console, predicts nothing."""
