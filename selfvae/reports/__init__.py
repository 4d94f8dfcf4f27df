"""Figures, tables and pages about trained models."""
