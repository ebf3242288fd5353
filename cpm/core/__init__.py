"""The deciding half of the manager: pure, values in and values out."""
