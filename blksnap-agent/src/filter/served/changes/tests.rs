//! Tests of change maps that outlive the agent.
